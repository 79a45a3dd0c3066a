"""Tests of the emulator alone."""
