"""Time one model against another in one run: images/s, peak memory and the ratio.

Six sub-commands make other tables: `ops` times the operators alone, `scaling` models over image sizes, `loader` the
reading of images, `distillation` training from a teacher's stored outputs, `inference_form` the optimisations of the
inference form on a CPU, and `runtimes` the inference form in ONNX Runtime and OpenVINO. Each has its own --help.

    python scripts/benchmark.py --model coatnet_0 --against coatnet_0_224
    python scripts/benchmark.py --model coatnet_0 --model-kwargs flavor=timm --against coatnet_0_224 --modes inference
    python scripts/benchmark.py --model coatnet_0 --against coatnet_0_224 --amp --device cuda --compile
    python scripts/benchmark.py ops --op dynamic --kernels 7
    python scripts/benchmark.py scaling --models lightconvnet_pico coatnet_pico
    python scripts/benchmark.py loader --data-dir imagenette

Inference is timed in the inference form of both models (`timm.utils.reparameterize_model`, which changes nothing where
there is nothing to fold), training as forward, backward and a step of SGD. The models take turns in windows of at least
--window seconds, and the median window counts, so that other load on the machine slows both.
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
    """Parse the command line (without the script's name), check it, and only then import and run the benchmark."""
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
