"""What cannot be had for less: open the file, look at the clock, print."""

import json
import sys
import time

with open(sys.argv[1]) as file:
    credentials = json.load(file)["claudeAiOauth"]
if credentials["expiresAt"] / 1000 - time.time() > 300:
    print(credentials["accessToken"])
