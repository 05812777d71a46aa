"""The lab's fixtures, for the tests here that race: one thread, and a folder with a user's tasks."""

from tests.lab.conftest import _one_thread, folder

__all__ = ["_one_thread", "folder"]
