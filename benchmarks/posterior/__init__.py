"""How far is a posterior from the exact one?"""
