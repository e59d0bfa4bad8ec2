"""Rewriting passes, one a file. Installed as `dyncompile.passes`."""

if __name__ != "dyncompile.passes":
    raise ImportError("import this package as `dyncompile.passes`, not as bare `passes`")

from dyncompile.passes.base import Pass, Refusal, Registration, Site, available, registered, resolve

__all__ = ["Pass", "Refusal", "Registration", "Site", "available", "registered", "resolve"]
