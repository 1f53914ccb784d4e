"""Recipes: settings of finetune.py by name. `--recipe NAME` sets them, and flags on the command line override them.

--batch-size counts the images of one process. --lr holds for --lr-base-size images a weight update and is scaled to the
actual number, as in timm's train.py, so that a recipe works on one GPU and on sixty-four.
"""

import argparse

from coatnet_train.runtime.cli import ConfigError

__all__ = ['RECIPES', 'recipe_defaults', 'recipe_settings']

# CoAtNet, appendix A.2 (https://arxiv.org/abs/2106.04803): 4096 images a step, 10,000 steps of warm-up (32 epochs).
# What the paper leaves open follows the same group's MaxViT settings.
COATNET_IN1K = dict(
    epochs=300, opt='adamw', lr=1e-3, lr_base_size=4096, min_lr=1e-5, warmup_epochs=32.0, weight_decay=0.05,
    clip_grad=1.0, smoothing=0.1, aa='rand-m15-n2', mixup=0.8, color_jitter=0.0, batch_size=128, amp=True,
    drop_path={'coatnet_0': 0.2, 'coatnet_1': 0.3, 'coatnet_2': 0.5, 'coatnet_3': 0.7})

# Its fine-tuning at a larger size: constant learning rate, 512 images a step, released from the average of weights.
COATNET_IN1K_384 = COATNET_IN1K | dict(
    img_size=384, epochs=30, lr=5e-5, lr_base_size=512, min_lr=5e-5, warmup_epochs=0.0, weight_decay=1e-8,
    model_ema=True, model_ema_decay=0.9999, batch_size=32)

# What all recipes for Tiny-ImageNet-200 share.
TIN200 = dict(
    img_size=64, crop_pct=1.0, scale=(0.35, 1.0), color_jitter=0.0, amp=True,
    mean=(0.4802, 0.4481, 0.3975), std=(0.2764, 0.2689, 0.2816),
    model_kwargs={name: ('dynamic_img_size=True', 'conv_norm_momentum=0.1') for name in (
        'coatnet_pico_64', 'coatnet_pico_ccdd_64', 'lightconvnet_pico_64', 'dynamicconvnet_pico_64')})
TIN200_PREVIEW = TIN200 | dict(epochs=10, train_img_sizes=(32, 32, 32, 48, 64), batch_size=64, lr=1e-3)

# Above each recipe: what it is for, its command, hardware and hours, and its result with the file that holds it
# (tests/test_documents.py compares them), or "not run". tin200 is Tiny-ImageNet-200 after hold_out.py.
RECIPES = {
    # The paper's ImageNet-1k run.
    # command:  torchrun --nproc-per-node 8 scripts/finetune.py --recipe coatnet_in1k --data-dir imagenet
    #           --model coatnet_0 --grad-accum-steps 4
    # result:   not run (the paper reports 81.6 % for CoAtNet-0)
    'coatnet_in1k': COATNET_IN1K,

    # Its fine-tuning at 384 px, from the run above.
    # command:  torchrun --nproc-per-node 8 scripts/finetune.py --recipe coatnet_in1k_384 --data-dir imagenet
    #           --model coatnet_0 --initial-checkpoint output/coatnet_0/model.safetensors --grad-accum-steps 2
    # result:   not run
    'coatnet_in1k_384': COATNET_IN1K_384,

    # The same at 512 px.
    # command:  as above, with --recipe coatnet_in1k_512 and --grad-accum-steps 4
    # result:   not run
    'coatnet_in1k_512': COATNET_IN1K_384 | dict(img_size=512, batch_size=16),

    # From random weights, on some ten thousand small images.
    # command:  python scripts/finetune.py --recipe imagenette_64 --data-dir imagenette
    #           --model coatnet_pico_64.untrained
    # hardware: one thread of an AMD EPYC (AVX512), 0.5 hours
    # result:   65.91 % (results/imagenette_64_cpu.json), from N(0, 0.02)
    'imagenette_64': dict(
        img_size=64, crop_pct=1.0, epochs=10, batch_size=64, lr=1e-3, scale=(0.35, 1.0), color_jitter=0.0, amp=True,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), model_kwargs={'coatnet_pico_64': ('conv_norm_momentum=0.1',)}),

    # Tiny-ImageNet-200 from labels alone, for a GPU.
    # command:  python scripts/finetune.py --recipe tin200 --data-dir tin200 --model coatnet_pico_64.untrained
    # result:   not run
    'tin200': TIN200 | dict(
        epochs=100, batch_size=512, lr=2e-3, warmup_epochs=5.0, drop_path=0.1, smoothing=0.1, cache_images=True,
        torchcompile=True, color_jitter=0.4, mixup=0.2, cutmix=1.0, reprob=0.25, model_ema=True,
        model_ema_decay=0.9998),

    # A teacher for it: ImageNet weights (import_weights.py) fine-tuned at twice the size; its targets stay soft.
    # command:  python scripts/finetune.py --recipe tin200_teacher --data-dir tin200 --model tf_efficientnet_lite2
    #           --pretrained --model-kwargs "pretrained_cfg_overlay={'file':'lite2.safetensors'}"
    # hardware: one NVIDIA H200, 0.03 hours
    # result:   72.60 % (results/tin200_dist/teacher/metrics.csv), held out of train
    'tin200_teacher': TIN200 | dict(
        img_size=128, epochs=6, val_interval=2, batch_size=256, lr=1e-3, warmup_epochs=1.0, weight_decay=0.02,
        cache_images=True, color_jitter=0.3, cutmix=1.0, mixup=0.2, mixup_prob=0.5, model_ema=True,
        model_ema_decay=0.998,
        mean=(0.498, 0.498, 0.498), std=(0.502, 0.502, 0.502)),

    # From a teacher that sees the very images of the student, mixed ones too: function matching, as in Beyer et al.
    # (https://arxiv.org/abs/2106.05237).
    # command:  python scripts/finetune.py --recipe tin200_dist --data-dir tin200 --model coatnet_pico_64.untrained
    #           --teacher local-dir:output/tin200_teacher
    # hardware: one NVIDIA H200, 0.16 hours, beside two other runs
    # result:   56.55 % (results/tin200_dist/coatnet_pico_64/metrics.csv), held out of train;
    #           lightconvnet_pico_64 50.25 % (results/tin200_dist/lightconvnet_pico_64/metrics.csv);
    #           dynamicconvnet_pico_64, stopped at 28 epochs,
    #           50.45 % (results/tin200_dist/dynamicconvnet_pico_64/metrics.csv)
    'tin200_dist': TIN200 | dict(
        epochs=32, val_interval=4, batch_size=512, lr=2e-3, warmup_epochs=3.0, drop_path=0.05, smoothing=0.0,
        cache_images=True, torchcompile=True, color_jitter=0.3, mixup=0.2, cutmix=1.0, model_ema=True,
        model_ema_decay=0.9995,
        teacher_img_size=128, kd_loss_weight=0.9, kd_temperature=2.0),

    # Imagenette at 128 px from random weights, for a GPU.
    # command:  python scripts/finetune.py --recipe nette --data-dir nette --model coatnet_nano
    # result:   not run
    'nette': dict(
        img_size=128, crop_pct=1.0, epochs=150, batch_size=256, lr=1.5e-3, warmup_epochs=10.0, drop_path=0.1,
        smoothing=0.1, scale=(0.25, 1.0), color_jitter=0.4, cache_images=True, torchcompile=True, mixup=0.2, cutmix=1.0,
        reprob=0.25, model_ema=True, model_ema_decay=0.999, amp=True,
        mean=(0.4625, 0.4579, 0.4301), std=(0.2821, 0.2790, 0.3011),
        model_kwargs={'coatnet_nano': ('conv_norm_momentum=0.1',)}),

    # Tiny-ImageNet-200 from labels alone on a few CPU cores: most epochs on small images.
    # command:  python scripts/finetune.py --recipe tin200_preview --data-dir tin200 --model coatnet_pico_64.untrained
    # hardware: one or two threads of a CPU with AVX512; 3.6 to 5.3 hours with the recipe below, beside other work
    # result:   23.65 % (results/tin200_preview/coatnet_pico_64/metrics.csv), held out of train, N(0, 0.02);
    #           lightconvnet_pico_64 31.45 % (results/tin200_preview/lightconvnet_pico_64/metrics.csv)
    'tin200_preview': TIN200_PREVIEW,

    # On from there, on larger images.
    # command:  as above, with --recipe tin200_preview_more
    #           --initial-checkpoint output/coatnet_pico_64/model.safetensors
    # hardware: as above
    # result:   28.40 % (results/tin200_preview/coatnet_pico_64/metrics_more.csv), held out of train, N(0, 0.02);
    #           lightconvnet_pico_64 36.65 % (results/tin200_preview/lightconvnet_pico_64/metrics_more.csv)
    'tin200_preview_more': TIN200_PREVIEW | dict(epochs=4, warmup_epochs=0.25, train_img_sizes=(48, 48, 64, 64)),

    # One's own images, from 50 to 5,000 of them. Batch size and epochs follow from their number (schedule.py), warm-up
    # from the epochs.
    # command:  python scripts/finetune.py --recipe small_data --data-dir photos_split --pretrained
    #           --model lightconvnet_pico_64.dist_tin200
    # hardware: one thread of a CPU with AVX2, minutes
    # result:   75.0 % (results/small_data_cpu.json) on 60 images of five classes
    'small_data': dict(
        batch_size=None, epochs=None, bn_momentum=0.1, scale=(0.35, 1.0), color_jitter=0.0),

    # Pretrained weights on some ten thousand images, against overfitting in 30 epochs. Fewer images, or fewer epochs,
    # never get past its augmentation and low learning rates: those are for small_data.
    # command:  python scripts/finetune.py --recipe finetune_small --data-dir images --model coatnet_0 --pretrained
    # result:   not run
    'finetune_small': dict(
        epochs=30, lr=5e-4, layer_decay=0.75, weight_decay=0.05, drop_path=0.1,
        aa='rand-m9-mstd0.5-inc1', reprob=0.25, mixup=0.2, cutmix=0.5, model_ema=True, model_ema_decay=0.999),

    # How good the features are: nothing but the classifier learns.
    # command:  python scripts/finetune.py --recipe linear_probe --data-dir images --model resnet50 --pretrained
    # result:   not run
    'linear_probe': dict(
        epochs=20, freeze_trunk=True, lr=3e-3, weight_decay=0.0, warmup_epochs=1.0, smoothing=0.0, color_jitter=0.0,
        scale=(0.3, 1.0), clip_grad=None),
}


def recipe_settings(recipe: str, model: str) -> dict[str, object]:
    """Settings of a recipe for a model; a setting that depends on the architecture is left out if it lists none."""
    found = {}
    for name, value in RECIPES[recipe].items():
        if isinstance(value, dict):
            value = value.get(model.split('.')[0])
            if value is None:
                continue
        found[name] = value
    return found


def recipe_defaults(arguments: list[str]) -> dict[str, object]:
    """Defaults for a command line from the --recipe that it names; {} without one.

    Reads --recipe and --model, and whether --amp is given: without it, a CPU without bfloat16 instructions overrides
    the recipe's mixed precision. Raises ConfigError for an unknown recipe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--recipe', default='')
    parser.add_argument('--model', default='')
    parser.add_argument('--amp', action=argparse.BooleanOptionalAction)
    given, _ = parser.parse_known_args(arguments)
    if not given.recipe:
        return {}
    if given.recipe not in RECIPES:
        raise ConfigError(f'--recipe must be one of {", ".join(RECIPES)}, got {given.recipe!r}.')
    return recipe_settings(given.recipe, given.model) | {'amp_if_native': given.amp is None}
