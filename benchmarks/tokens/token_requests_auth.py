import sys

from requests_auth import JsonTokenFileCache

print(JsonTokenFileCache(sys.argv[1]).get_token("bench"))
