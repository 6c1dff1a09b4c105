"""How good are the predictions?"""
