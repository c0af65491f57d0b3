# SPDX-License-Identifier: Apache-2.0
from . import animate as animate
from . import assimilate as assimilate
from . import benchmark as benchmark
from . import export as export
from . import generate as generate
from . import prepare as prepare
from . import resume as resume
from . import simulate as simulate
from . import train as train
from . import verify as verify
