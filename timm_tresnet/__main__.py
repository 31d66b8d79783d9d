"""`python -m timm_tresnet SCRIPT.py …` and `torchrun -m timm_tresnet SCRIPT.py …` run a script with the plugin.

With other arguments, this is the `timm-tresnet` command.
"""

import os
import runpy
import sys

if len(sys.argv) > 1 and sys.argv[1].endswith(".py"):
    if not os.path.isfile(sys.argv[1]):
        sys.exit(f"python -m timm_tresnet needs a script, but there is no file {sys.argv[1]}")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    from timm_tresnet.cli.main import main

    sys.exit(main())
