def value_1_0(x):
    return x * 1 + 0

def value_1_1(x):
    return x * 2 + 1

def value_1_2(x):
    return x * 3 + 2

def value_1_3(x):
    return x * 4 + 3

def value_1_4(x):
    return x * 5 + 4

def value_1_5(x):
    return x * 6 + 5
