def value_0_0(x):
    return x * 0 + 0

def value_0_1(x):
    return x * 1 + 1

def value_0_2(x):
    return x * 2 + 2

def value_0_3(x):
    return x * 3 + 3

def value_0_4(x):
    return x * 4 + 4

def value_0_5(x):
    return x * 5 + 5
