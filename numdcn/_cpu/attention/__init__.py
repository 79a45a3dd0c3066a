"""Weighted samples of channels-last images: deformable attention, DCNv3, DCNv4. Calls enter at `run`."""
