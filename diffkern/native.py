"""Finds, else builds, and loads the native libraries."""

LIBRARIES = ("cpu", "cuda")


def why_not(library: str) -> str | None:
    """None when the library is loaded, else the reason why it is not."""
    return f"the {library} library is not built"
