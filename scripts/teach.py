"""Store the outputs of a teacher for some augmented views of every training image, once for any number of students.

    python scripts/teach.py --teacher local-dir:output/tin200_teacher --recipe tin200_dist --data-dir tin200 \\
        --views 4 --output teacher_outputs
    python scripts/finetune.py --recipe tin200_dist --model coatnet_pico_64.untrained --data-dir tin200 \\
        --teacher-outputs teacher_outputs
    python scripts/teach.py --teacher local-dir:output/tin200_teacher --recipe tin200_dist --data-dir tin200 \\
        --top-k 16 --temperatures 1 2 --output teacher_outputs_top16
    torchrun --nproc-per-node 8 scripts/teach.py --teacher ... --data-dir imagenet --top-k 16

A teacher that runs in every step may cost more than the student. Stored outputs for a few fixed views of each image
cost a table look-up instead (the idea of Shen and Xing, https://arxiv.org/abs/2112.01528).

View v of image i is drawn by the student's own augmentation from (seed, i, v). Crop, flip, colours and so on are set by
--recipe or the flags of finetune.py, and run in PIL or, with --cache-images, on the device. In each epoch finetune.py
takes the next view of every image, starting with one drawn from its --seed and the image. Mixup and cutmix follow: a
mixed image has the outputs of both of its images as targets, just as it has both labels. With --train-img-sizes the
student sees the same crop at another size. --img-size is the size of the view that is cut for the teacher, and
--teacher-img-size resizes it from there.

Logits are stored in float16, minus the maximum of each view: those of all classes (2 bytes each), or with --top-k the
largest alone, all other classes being merged into one (4 bytes for each of the k). The weight of the merged class
depends on the temperature, so --temperatures lists those that students may use; without --top-k any is possible.

OUTPUT gets the shards and manifest.json, which identifies images, views, seed and the teacher's weights by digests.
finetune.py rejects outputs for other images or augmentation, and shards that have changed. Rerunning a killed call
continues it; a call with other settings, images or weights is rejected.
"""
from coatnet_train.runtime.cli import run_cli
from coatnet_train.training.teach_config import TeachSettings, check_values, read_settings


def main(settings: TeachSettings) -> dict:
    """Store the outputs of a teacher, and return the manifest that is also written to manifest.json."""
    check_values(settings)
    from coatnet_train.training.teaching import teach  # here: torch and timm take seconds to import
    return teach(settings)


if __name__ == '__main__':
    run_cli('teach.py', lambda: main(read_settings(description=__doc__)))
