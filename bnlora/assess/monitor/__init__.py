"""Monitoring of a deployed classifier over time, with tests that may be read after every row.

| module        | contents                                                            |
|---------------|---------------------------------------------------------------------|
| `state`       | `Monitor`: the state, its updates, alerts and recommendation        |
| `betting`     | evidence against a null by bets, mixed over all start times         |
| `sequences`   | confidence sequences of running means                               |
| `calibration` | bets against calibrated confidence; running bins                    |
| `shift`       | ranks of unlabelled scores among reference scores                   |
| `watch`       | a test with its alert                                               |
| `stored`      | the state as a JSON file                                            |
"""

from bnlora.assess.monitor.betting import Evidence as Evidence
from bnlora.assess.monitor.calibration import Bins as Bins
from bnlora.assess.monitor.rows import Logged as Logged
from bnlora.assess.monitor.rows import Observed as Observed
from bnlora.assess.monitor.sequences import MeanSequence as MeanSequence
from bnlora.assess.monitor.shift import Ranks as Ranks
from bnlora.assess.monitor.state import Monitor as Monitor
from bnlora.assess.monitor.state import Point as Point
from bnlora.assess.monitor.stored import load_monitor as load_monitor
from bnlora.assess.monitor.stored import read_notes as read_notes
from bnlora.assess.monitor.stored import save_monitor as save_monitor
from bnlora.assess.monitor.watch import Alert as Alert
from bnlora.assess.monitor.watch import Watch as Watch
