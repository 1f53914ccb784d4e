"""Store the outputs of a teacher for some views of every training image, once, for any number of students.

    python scripts/teach.py --teacher local-dir:output/tin200_teacher --recipe tin200_dist --data-dir tin200 \\
        --views 4 --output teacher_outputs
    python scripts/finetune.py --recipe tin200_dist --model coatnet_pico_64.untrained --data-dir tin200 \\
        --teacher-outputs teacher_outputs
    python scripts/teach.py --teacher local-dir:output/tin200_teacher --recipe tin200_dist --data-dir tin200 \\
        --top-k 16 --temperatures 1 2 --output teacher_outputs_top16
    torchrun --nproc-per-node 8 scripts/teach.py --teacher ... --data-dir imagenet --top-k 16

A teacher that runs in every step may cost more than the student. Its outputs for a few fixed views of each image,
stored once, cost a look into a table (the idea is that of Shen and Xing, https://arxiv.org/abs/2112.01528).

View v of image i is what the student's own augmentation draws from (seed, i, v): crop, flip, colours and the rest are
those of --recipe or of the same flags as in finetune.py, by PIL or, with --cache-images, on the device. In each epoch
finetune.py takes the next view of every image, beginning with one that follows from its --seed and the image. Mixup and
cutmix come after that: a mixed image is taught by the outputs of both of its images, as it is by both labels. With
--train-img-sizes the student sees the same crop at another size; --img-size is the size at which the view is cut for
the teacher, and --teacher-img-size resizes it from there.

Logits are kept in float16, minus the largest of each view: of all classes (2 bytes each), or by --top-k of the largest
alone, with all other classes as one (4 bytes for each of the k). The weight of these others depends on the temperature,
so --temperatures names those that students may use; without --top-k any will do.

OUTPUT gets shards and manifest.json, which names images, views, seed and the teacher's weights by their digests.
finetune.py refuses outputs for other images or other augmentation, and shards that are not as they were written. A
call that was killed goes on where it was; one with other settings, images or weights is refused.
"""
from coatnet_train.runtime.cli import run_cli
from coatnet_train.training.teach_config import TeachSettings, check_values, read_settings


def main(settings: TeachSettings) -> dict:
    """Store the outputs, and return the manifest that is also written to manifest.json."""
    check_values(settings)
    from coatnet_train.training.teaching import teach  # here: torch and timm take seconds to import
    return teach(settings)


if __name__ == '__main__':
    run_cli('teach.py', lambda: main(read_settings(description=__doc__)))
