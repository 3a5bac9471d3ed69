"""One dataclass of settings as a command line.

Place in the pipeline: first of all, in train.py and eval.py.
"""
import argparse
import inspect
import re
from dataclasses import fields


def parse_flags(config_class, argv=None, defaults: dict | None = None):
    """A dataclass as a command line: every field a --flag, its comment the help text. Unknown flags exit with
    code 2. `defaults` replaces default values by field name (a saved configuration)."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False)
    for f in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type in (bool, "bool") else {"type": f.type}
        help_text = f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%")
        default = (defaults or {}).get(f.name, f.default)
        parser.add_argument(f"--{f.name}", default=default, help=help_text, **kind)
    return config_class(**vars(parser.parse_args(argv)))
