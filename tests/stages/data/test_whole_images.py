import threading

import numpy as np
import pytest

from stages.data.transforms import PADDING_COLOUR
from stages.data.whole_images import batches_of_one_size, fill_padded, padded_size, prefetch, resize_image, scaled_size


def test_sizes_by_hand():
    assert scaled_size((375, 500)) == (375, 500)
    assert scaled_size((375, 500), scale=0.5) == (188, 250)
    assert scaled_size((375, 500), short_side_px=224) == (224, 299)
    assert scaled_size((500, 375), short_side_px=224, scale=2.0) == (597, 448)
    assert scaled_size((40, 400), scale=0.1) == (32, 40)
    assert padded_size((188, 256), 32) == (192, 256)


def test_resize_keeps_height_and_width_apart_and_leaves_a_fitting_image_alone():
    image = np.zeros((10, 20, 3), dtype=np.uint8)
    image[:, 10:] = 200
    resized = resize_image(image, (5, 40))
    assert resized.shape == (5, 40, 3)
    assert (resized[:, :15].max(), resized[:, 25:].min()) == (0, 200)
    assert resize_image(image, (10, 20)) is image


def test_padding_is_the_mean_colour_at_the_right_and_bottom():
    target = np.full((3, 4, 3), 7, dtype=np.uint8)
    fill_padded(target, np.full((2, 3, 3), 250, dtype=np.uint8))
    assert (target[:2, :3] == 250).all()
    assert (target[2] == PADDING_COLOUR).all()
    assert (target[:, 3] == PADDING_COLOUR).all()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_the_order_and_reads_only_a_little_ahead(workers):
    started, lock = [], threading.Lock()

    def load(job):
        with lock:
            started.append(job)
        return job * 10

    for position, (job, loaded) in enumerate(prefetch(load, range(20), workers=workers)):
        assert (job, loaded) == (position, position * 10)
        assert len(started) <= position + 1 + workers


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_raises_what_loading_raised(workers):
    def load(job):
        if job == 2:
            raise OSError("job 2 is broken")
        return job

    done = []
    with pytest.raises(OSError, match="job 2 is broken"):
        done.extend(loaded for _, loaded in prefetch(load, range(9), workers=workers))
    assert done == [0, 1]


def test_images_of_one_size_share_batches_in_their_order() -> None:
    items = [("a", (2, 3)), ("b", (4, 4)), ("c", (2, 3)), ("d", (2, 3)), ("e", (4, 4))]
    assert batches_of_one_size(items, most_images=2, most_px=12) == [["a", "c"], ["d"], ["b"], ["e"]]
