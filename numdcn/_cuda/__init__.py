"""The CUDA wing: arrays on a GPU. Imported when the first of them comes."""
