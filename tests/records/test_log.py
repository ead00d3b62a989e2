"""Who reads a warning knows whose it is."""

import subprocess
import sys

CODE = """
import logging, sys
from iimm_callbacks.records.log import get_logger
if len(sys.argv) > 1:
    logging.basicConfig(format="%(name)s|%(message)s")
get_logger("iimm_callbacks.data").warning("label %d", 3)
"""


def said(*arguments):
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    return done.stderr.strip()


def test_without_a_handler_a_warning_names_the_package():
    assert said() == "iimm_callbacks: label 3"


def test_a_handler_names_the_logger_and_nothing_is_said_twice():
    assert said("configured") == "iimm_callbacks.data|label 3"
