"""Your data. A function here returns one DataFrame that contains the target column. A file in conf/data/ names the function.

Copy conf/data/digits.yaml for your file. docs/data.md explains its keys. All other keys are arguments of the function:
`def load_houses(since: int)` needs `_target_: project.data.load_houses` and `since: 2020`, and `-P data.since=2021` sets it.
An argument called `path` names a file. `main` reuses a finished run only if the content of this file is the same. Without a
`path`, the same arguments must give the same rows.
"""

import numpy as np
import pandas as pd


def load_digits(rotate: float = 0.0, start: int | None = None, stop: int | None = None) -> pd.DataFrame:
    """The 1,797 handwritten digits of scikit-learn, in the order of its file, which is grouped by writer.

    `rotate` is the number of degrees by which each 8x8 image is rotated. start:stop selects rows. Both make a shift to
    study. Columns: pixel_ROW_COLUMN, 64 of float64 in 0..16, and `digit`, 0..9.
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
