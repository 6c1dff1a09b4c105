"""Simulation-based calibration.

| module        | contents                                                            |
|---------------|---------------------------------------------------------------------|
| `simulation`  | `run`: data from the prior, inferences, ranks                       |
| `ranking`     | ranks of the truth among posterior draws                            |
| `calibration` | tests of the ranks and a verdict                                    |
| `core`        | inferences of a tangent model under the core prior                  |
"""

from bnlora.assess.sbc.calibration import Calibration as Calibration
from bnlora.assess.sbc.simulation import Inference as Inference
from bnlora.assess.sbc.simulation import Simulation as Simulation
from bnlora.assess.sbc.simulation import importance_inference as importance_inference
from bnlora.assess.sbc.simulation import run as run
from bnlora.assess.sbc.simulation import run_posterior as run_posterior
from bnlora.assess.sbc.simulation import simulate as simulate
from bnlora.assess.sbc.simulation import svi_inference as svi_inference
