"""Settings of finetune.py by name: `--recipe NAME` sets these, and flags given beside it win.

--batch-size counts images of one process. --lr is meant for --lr-base-size images a step, and is scaled to what a
step really has, as in timm's train.py; so a recipe is the same on one GPU and on sixty-four.
"""

__all__ = ['RECIPES', 'recipe_settings']

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

# Tiny-ImageNet-200, from nothing.
TIN200 = dict(
    img_size=64, crop_pct=1.0, scale=(0.35, 1.0), color_jitter=0.0, amp=True,
    mean=(0.4802, 0.4481, 0.3975), std=(0.2764, 0.2689, 0.2816),
    model_kwargs={name: ('dynamic_img_size=True', 'conv_norm_momentum=0.1') for name in (
        'coatnet_pico_64', 'coatnet_pico_ccdd_64', 'lightconvnet_pico_64', 'dynamicconvnet_pico_64')})
TIN200_PREVIEW = TIN200 | dict(epochs=10, train_img_sizes=(32, 32, 32, 48, 64), batch_size=64, lr=1e-3)

RECIPES = {
    'coatnet_in1k': COATNET_IN1K,
    'coatnet_in1k_384': COATNET_IN1K_384,
    'coatnet_in1k_512': COATNET_IN1K_384 | dict(img_size=512, batch_size=16),
    # From nothing, on some ten thousand small images: what results/imagenette_64_cpu.json was made with.
    'imagenette_64': dict(
        img_size=64, crop_pct=1.0, epochs=10, batch_size=64, lr=1e-3, scale=(0.35, 1.0), color_jitter=0.0, amp=True,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), model_kwargs={'coatnet_pico_64': ('conv_norm_momentum=0.1',)}),
    # For a GPU, which it has not seen yet.
    'tin200': TIN200 | dict(
        epochs=100, batch_size=512, lr=2e-3, warmup_epochs=5.0, drop_path=0.1, smoothing=0.1, cache_images=True,
        torchcompile=True, color_jitter=0.4, mixup=0.2, cutmix=1.0, reprob=0.25, model_ema=True,
        model_ema_decay=0.9998),
    # Its teacher: ImageNet weights (import_weights.py) fine-tuned at twice the size; its targets stay soft.
    'tin200_teacher': TIN200 | dict(
        img_size=128, epochs=6, val_interval=2, batch_size=256, lr=1e-3, warmup_epochs=1.0, weight_decay=0.02,
        cache_images=True, color_jitter=0.3, cutmix=1.0, mixup=0.2, mixup_prob=0.5, model_ema=True,
        model_ema_decay=0.998,
        mean=(0.498, 0.498, 0.498), std=(0.502, 0.502, 0.502)),
    # From a teacher that sees the very images of the student, mixed ones too: function matching, as in Beyer et al.
    # (https://arxiv.org/abs/2106.05237).
    'tin200_dist': TIN200 | dict(
        epochs=32, val_interval=4, batch_size=512, lr=2e-3, warmup_epochs=3.0, drop_path=0.05, smoothing=0.0,
        cache_images=True, torchcompile=True, color_jitter=0.3, mixup=0.2, cutmix=1.0, model_ema=True,
        model_ema_decay=0.9995,
        teacher_img_size=128, kd_loss_weight=0.9, kd_temperature=2.0),
    # Imagenette at 128 px, from nothing: as much for a GPU, and as unseen.
    'nette': dict(
        img_size=128, crop_pct=1.0, epochs=150, batch_size=256, lr=1.5e-3, warmup_epochs=10.0, drop_path=0.1,
        smoothing=0.1, scale=(0.25, 1.0), color_jitter=0.4, cache_images=True, torchcompile=True, mixup=0.2, cutmix=1.0,
        reprob=0.25, model_ema=True, model_ema_decay=0.999, amp=True,
        mean=(0.4625, 0.4579, 0.4301), std=(0.2821, 0.2790, 0.3011),
        model_kwargs={'coatnet_nano': ('conv_norm_momentum=0.1',)}),
    # For a few CPU cores, previews: most epochs on small images, then on from there (--initial-checkpoint) on larger
    # ones.
    'tin200_preview': TIN200_PREVIEW,
    'tin200_preview_more': TIN200_PREVIEW | dict(epochs=4, warmup_epochs=0.25, train_img_sizes=(48, 48, 64, 64)),
    # One's own images, from 50 to 5,000 of them: what results/small_data_cpu.json was made with. Batch size and epochs
    # follow from their number (schedule.py), warm-up from the epochs.
    'small_data': dict(
        batch_size=None, epochs=None, bn_momentum=0.1, scale=(0.35, 1.0), color_jitter=0.0),
    # Pretrained weights on some ten thousand images, against overfitting in 30 epochs. Fewer images, or fewer epochs,
    # never get past its augmentation and low learning rates: those are for small_data.
    'finetune_small': dict(
        epochs=30, lr=5e-4, layer_decay=0.75, weight_decay=0.05, drop_path=0.1,
        aa='rand-m9-mstd0.5-inc1', reprob=0.25, mixup=0.2, cutmix=0.5, model_ema=True, model_ema_decay=0.999),
    # How good the features are: nothing but the classifier learns.
    'linear_probe': dict(
        epochs=20, freeze_trunk=True, lr=3e-3, weight_decay=0.0, warmup_epochs=1.0, smoothing=0.0, color_jitter=0.0,
        scale=(0.3, 1.0), clip_grad=None),
}


def recipe_settings(recipe: str, model: str) -> dict[str, object]:
    """The settings of a recipe for a model: what depends on the model's name is looked up, or left alone."""
    found = {}
    for name, value in RECIPES[recipe].items():
        if isinstance(value, dict):
            value = value.get(model.split('.')[0])
            if value is None:
                continue
        found[name] = value
    return found
