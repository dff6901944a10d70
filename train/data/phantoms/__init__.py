"""Generated images in place of real ones, one file each; a data set need not have any."""
