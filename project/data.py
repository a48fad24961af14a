"""Your data: a function here returns one DataFrame with the target column in it; a file in conf/data/ names it.

Copy conf/data/digits.yaml for yours: what it holds beside the arguments (`target`, `split`, ...) is read by all loaders.
The function's arguments are keys of that file: `def load_houses(since: int)` goes with `_target_: project.data.load_houses`
and `since: 2020`, and is then set by `-P data.since=2021`. One called `path` is a file whose content counts when `main`
looks for a finished run to reuse; without it the same arguments mean the same rows.
"""

import numpy as np
import pandas as pd


def load_digits(rotate: float = 0.0, start: int | None = None, stop: int | None = None) -> pd.DataFrame:
    """The 1,797 handwritten digits that scikit-learn brings along, in the order of its file, which groups the writers.

    `rotate` turns each 8x8 image by so many degrees (bilinear; what turns in from outside is 0), and start:stop is a
    slice of the rows: both give a shift to study. Columns: pixel_ROW_COLUMN, 64 of float64 in 0..16, and `digit`, 0..9.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    images, digit = bunch.images[start:stop], bunch.target[start:stop]
    if rotate and len(images):
        from scipy.ndimage import rotate as rotate_images

        images = rotate_images(images, rotate, axes=(1, 2), reshape=False, order=1)
    names = [f"pixel_{row}_{column}" for row in range(8) for column in range(8)]
    frame = pd.DataFrame(images.reshape(-1, 64).astype(np.float64), columns=names).assign(digit=digit)
    frame.attrs["source"] = "sklearn.datasets.load_digits"
    return frame
