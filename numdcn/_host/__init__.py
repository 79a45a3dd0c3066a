"""Python shared by the doors: arrays, checks, threads and scratch memory."""
