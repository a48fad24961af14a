"""Which version serves: the alias is read, the version fetched, tried and swapped to; events hurry it."""
