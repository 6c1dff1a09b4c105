"""What the tests of guides take for a model: a prior without data."""


class PriorAlone:
    """A model that is its prior alone."""

    def __init__(self, program):
        self.program = program

    def prior(self, *_):
        return self.program()

    def __call__(self, *_):
        self.prior()
