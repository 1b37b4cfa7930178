def value_3_0(x):
    return x * 3 + 0

def value_3_1(x):
    return x * 4 + 1

def value_3_2(x):
    return x * 5 + 2

def value_3_3(x):
    return x * 6 + 3

def value_3_4(x):
    return x * 7 + 4

def value_3_5(x):
    return x * 8 + 5
