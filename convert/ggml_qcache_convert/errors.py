"""The one exception the converter raises for input it can't or won't convert."""


class ConversionError(ValueError):
    """Input that is unsupported, damaged or inconsistent; the text names the file, the tensor or key, the values."""
