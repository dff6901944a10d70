"""Scans as people have them, in files of any of the formats of medicine and photography, to read and to write alike."""
