def value_5_0(x):
    return x * 5 + 0

def value_5_1(x):
    return x * 6 + 1

def value_5_2(x):
    return x * 7 + 2

def value_5_3(x):
    return x * 8 + 3

def value_5_4(x):
    return x * 9 + 4

def value_5_5(x):
    return x * 10 + 5
