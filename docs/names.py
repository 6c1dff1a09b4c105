"""A name that a package takes from its module of the same name is what the module holds, not the module.

`bnlora.priors.normal` is a function for whoever imports it, and a file for whoever reads the folder. This
extension of griffe settles it for readers as Python does for importers.
"""

from typing import Any

import griffe


class PublicNames(griffe.Extension):
    """Put members in the place of the modules that they hide."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Settle the names of a package and of those in it."""
        for name, path in pkg.imports.items():
            module = pkg.modules.get(name)
            if module is not None and path == f"{pkg.path}.{name}.{name}":
                member = module.members[name]
                member.extra["bnlora"]["module"] = module.docstring.value if module.docstring else ""
                pkg.set_member(name, member)
        for module in list(pkg.modules.values()):
            if module.is_init_module:
                self.on_package(pkg=module)
