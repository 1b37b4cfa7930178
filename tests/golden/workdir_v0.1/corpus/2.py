def value_2_0(x):
    return x * 2 + 0

def value_2_1(x):
    return x * 3 + 1

def value_2_2(x):
    return x * 4 + 2

def value_2_3(x):
    return x * 5 + 3

def value_2_4(x):
    return x * 6 + 4

def value_2_5(x):
    return x * 7 + 5
