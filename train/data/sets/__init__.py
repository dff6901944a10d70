"""The data sets, one file each; ``train.data`` imports, and thereby registers, every one of them."""
