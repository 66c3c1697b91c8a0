"""Bytes on a disk: whole files or none, checked files, digests. Knows nothing of what they hold."""
