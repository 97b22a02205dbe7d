import opd.quiet  # noqa: F401
