from anthropic.lib.credentials import CredentialsFile, TokenCache

print(TokenCache(CredentialsFile("bench")).get_token())
