"""Time one model against another, side by side in one run: images/s, peak memory and the ratio.

Six sub-commands make other tables: `ops` times the operators by themselves, `scaling` models over image sizes,
`loader` the reading of images, `distillation` training from a teacher's stored outputs, `inference_form` its
optimisations on a CPU, `runtimes` it beside ONNX Runtime and OpenVINO; each has a --help of its own.

    python scripts/benchmark.py --model coatnet_0 --against coatnet_0_224
    python scripts/benchmark.py --model coatnet_0 --model-kwargs flavor=timm --against coatnet_0_224 --modes inference
    python scripts/benchmark.py --model coatnet_0 --against coatnet_0_224 --amp --device cuda --compile
    python scripts/benchmark.py ops --op dynamic --kernels 7
    python scripts/benchmark.py scaling --models lightconvnet_pico coatnet_pico
    python scripts/benchmark.py loader --data-dir imagenette

Inference is timed in the inference form of both (`timm.utils.reparameterize_model`, which leaves a model as it is
where it has nothing to fold), training as forward, backward and a step of SGD. The two take turns, a window of at
least --window seconds each, and the median window counts, so that a busy machine slows both.
"""
import sys
from inspect import cleandoc

from coatnet_train.benchmarks.config import (
    DistillationSettings,
    InferenceFormSettings,
    LoaderSettings,
    ModelPairSettings,
    OpsSettings,
    RuntimesSettings,
    ScalingSettings,
    check_benchmark,
    check_distillation,
    check_inference_form,
    check_ops,
    check_runtimes,
    check_scaling,
)
from coatnet_train.runtime.cli import parse_flags, run_cli

TABLES = {
    'distillation': DistillationSettings, 'inference_form': InferenceFormSettings, 'ops': OpsSettings,
    'runtimes': RuntimesSettings, 'scaling': ScalingSettings, 'loader': LoaderSettings}


def dispatch(arguments: list[str]) -> None:
    """Take the command line, without the name of the script; what takes seconds to import comes last."""
    table = arguments[0] if arguments and arguments[0] in TABLES else ''
    kind = TABLES.get(table, ModelPairSettings)
    description = cleandoc(kind.__doc__) if table else __doc__
    settings = parse_flags(kind, description, arguments[bool(table):])
    if table == 'ops':
        check_ops(settings)
        from coatnet_train.benchmarks.ops import main
    elif table == 'scaling':
        check_scaling(settings)
        from coatnet_train.benchmarks.scaling import main
    elif table == 'loader':
        check_benchmark(settings, ('batch_size', 'rounds', 'window', 'threads'))
        from coatnet_train.benchmarks.loader import main
    elif table == 'distillation':
        check_distillation(settings)
        from coatnet_train.benchmarks.distillation import main
    elif table == 'inference_form':
        check_inference_form(settings)
        from coatnet_train.benchmarks.inference_form import main
    elif table == 'runtimes':
        check_runtimes(settings)
        from coatnet_train.benchmarks.runtimes import main
    else:
        check_benchmark(settings, ('batch_size', 'img_size', 'threads', 'rounds', 'window'))
        from coatnet_train.benchmarks.models import main
    main(settings)


if __name__ == '__main__':
    run_cli('benchmark.py', lambda: dispatch(sys.argv[1:]))
