"""On the path of a child process: gives it a stand-in for Apple's frameworks of the profile that ANERT_FAKE_PROFILE
names, as the fixture fake_ane gives one to a test. Python imports this file at start, whatever it then runs."""

import os
import sys
from pathlib import Path

if "ANERT_FAKE_PROFILE" in os.environ:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import fake_ane

    STAND_IN = fake_ane.FakeAne(*fake_ane.build(), os.environ["ANERT_FAKE_PROFILE"], "fp32", 1)
    STAND_IN.install(missing=os.environ.get("ANERT_FAKE_MISSING", ""))
    STAND_IN.reset()
    os.environ["ANERT_ANE"], os.environ["ANERT_ANE_FRAMEWORK"] = str(STAND_IN.shim), STAND_IN.path
