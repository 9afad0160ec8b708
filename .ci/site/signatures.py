"""Shows signatures as they are at run time, though the site reads the source and imports nothing."""

import griffe


class RunTimeSignatures(griffe.Extension):
    """Resolves what a signature takes from elsewhere.

    The keywords of f take the place of `**variants` below `@_with_keywords_of(f)`. A default that is a
    private number of its module, such as `_POWER`, is shown as that number.
    """

    def on_function(self, *, func, **_):
        """Puts private numbers in place of their names."""
        for parameter in func.parameters:
            name = str(parameter.default)
            if name.startswith("_") and name in func.module.attributes:
                parameter.default = func.module.attributes[name].value

    def on_package(self, *, pkg, **_):
        """Puts forwarded keywords in their place."""
        for function in pkg["optimizers"].functions.values():
            for decorator in function.decorators:
                if decorator.callable_path.endswith("._with_keywords_of"):
                    (forwarded,) = decorator.value.arguments
                    self._replace(function, pkg.modules_collection[forwarded.canonical_path].parameters)

    def _replace(self, function, of):
        own = [p for p in function.parameters if p.kind is not griffe.ParameterKind.var_keyword]
        keywords = [p for p in of if p.kind is griffe.ParameterKind.keyword_only]
        function.parameters = griffe.Parameters(*own, *keywords)
