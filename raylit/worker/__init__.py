"""The driven side: runs commands, yields reports. Never imports ray."""
