"""Imports every module of the installed package, to see what a system lacks."""

import importlib
import pkgutil

import qwlora

names = [module.name for module in pkgutil.walk_packages(qwlora.__path__, "qwlora.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(f"{len(names)} modules")
