"""Explore a prior on the tangent model: change it, and see at once what follows.

| module     | content                                                                      |
|------------|------------------------------------------------------------------------------|
| `explorer` | `explore`: what a change needs of the rows, computed once; one setting's result |
| `settings` | a prior in the terms of the controls: scales, layers, their law, rows in use |
| `posterior`| compiled programs: evidence, and the moments of the contrasts                |
| `explored` | the result: prior predictive, evidence, predictions, the code of it          |
| `drawing`  | small pictures as SVG, in the colours of the page                            |
| `panel`    | controls for Jupyter; the only file that imports ipywidgets                  |
"""

from bnlora.assess.explore.explored import Explored as Explored
from bnlora.assess.explore.explorer import Explorer as Explorer
from bnlora.assess.explore.explorer import explore as explore
from bnlora.assess.explore.settings import Settings as Settings
