"""The embedded demo checkpoint: data files only, see README.md beside them. Nothing is imported from here."""
