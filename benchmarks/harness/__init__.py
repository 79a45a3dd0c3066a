"""Measuring and reporting: processes, times, memory, targets, tables and charts."""
