import sys

from google.oauth2.credentials import Credentials

credentials = Credentials.from_authorized_user_file(sys.argv[1])
if credentials.valid:
    print(credentials.token)
