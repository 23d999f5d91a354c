"""What is fuzzed: for every kind of foreign file, damaged examples and the code that reads them.

A target lays files into a folder and has minifuse read them. Whatever the files hold, minifuse
gives a result or raises a MinifuseError with a message of one line, within bounded time and memory,
and leaves nothing beside what it was asked to write.
"""

from . import data_files, model_files

TARGETS = {target.name: target for target in (*model_files.TARGETS, *data_files.TARGETS)}
