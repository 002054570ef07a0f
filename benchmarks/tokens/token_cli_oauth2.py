import sys

from oauthcli import AuthFlow
from requests_oauthlib import OAuth2Session

session = OAuth2Session("bench")
flow = AuthFlow("bench", session, sys.argv[1], sys.argv[1])
if flow.authorized:
    print(session.access_token)
