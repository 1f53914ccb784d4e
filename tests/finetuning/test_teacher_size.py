"""--teacher-img-size: the teacher gets the images of the student resized to another size."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coatnet_train.runtime.cli import ConfigError
from coatnet_train.training import run as training_run
from coatnet_train.training.distillation import ResizedInput
from support.finetune_runs import read_metrics, run


class Recorder(nn.Module):
    """Returns its input images."""

    num_classes, pretrained_cfg = 3, {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * 1


@pytest.mark.parametrize('compiled', [False, True])
def test_images_of_any_size_reach_the_model_at_its_own(compiled):
    model = ResizedInput(Recorder(), 48)
    if compiled:
        model.compile(backend='aot_eager')  # the graph that inductor would get, without its minute of C++ compilation
    for size in (32, 40, 48, 96):
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        expected = images if size == 48 else F.interpolate(images, (48, 48), mode='bicubic', antialias=True)
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


def test_teacher_sees_its_size_and_the_student_another(settings, monkeypatch):
    teacher = run(settings, model='test_vit', img_size=48, experiment='teacher', epochs=1)  # takes multiples of 16 px
    sizes, build = [], training_run.build_task

    def watch(settings, model, teacher, *others):
        model.register_forward_pre_hook(lambda _, inputs: sizes.append(('student', *inputs[0].shape[2:])))
        teacher.model.register_forward_pre_hook(lambda _, inputs: sizes.append(('teacher', *inputs[0].shape[2:])))
        return build(settings, model, teacher, *others)

    monkeypatch.setattr(training_run, 'build_task', watch)
    run_dir = run(settings, teacher=f'local-dir:{teacher}', teacher_img_size=48, train_img_sizes=(24, 32))
    assert set(sizes) == {('student', 24, 24), ('student', 32, 32), ('teacher', 48, 48)}
    assert len(read_metrics(run_dir)) == 2


def test_sizes_that_the_teacher_cannot_take_are_refused(settings):
    teacher = f'local-dir:{run(settings, model="test_vit", img_size=48, experiment="teacher", epochs=1)}'
    with pytest.raises(ConfigError, match=r'--teacher local-dir:.* cannot look at images of \(3, 40, 40\): '):
        run(settings, teacher=teacher, img_size=40)
    with pytest.raises(ConfigError, match=r'--teacher .* cannot be opened .* --teacher-img-size 50 cannot be built'):
        run(settings, teacher=teacher, teacher_img_size=50)
    with pytest.raises(ConfigError, match='--teacher-img-size must be greater than 0, got 0'):
        run(settings, teacher=teacher, teacher_img_size=0)
