"""The version of this package, where every part can read it."""

VERSION = "0.1.0"
