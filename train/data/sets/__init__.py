"""The data sets, one file each: a new one is a file with a subclass of ``DataSet``, and a name in the line below."""

from __future__ import annotations

from train.data.sets import camus, covidct, drimdb, folder, isic2018, lizard, mri

__all__ = ["camus", "covidct", "drimdb", "folder", "isic2018", "lizard", "mri"]
