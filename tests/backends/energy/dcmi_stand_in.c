/* Stands for libdcmi.so: card 3 with one chip, card 7 with two; with SECOND, DCMI's second version beside it. */
#ifdef NO_NUMBERS
#define NUMBERS 0
#else
#define NUMBERS 1
#endif
static int codes[3];
enum { INIT, POWER, SECOND_INIT };

void stand_in(int key, int code) { codes[key] = code; }

int dcmi_init(void) { return codes[INIT]; }

int dcmi_get_card_list(int *count, int *cards, int length) {
    *count = 2;
    cards[0] = 3;
    cards[1] = 7;
    return length >= 2 ? 0 : -8001;
}

int dcmi_get_device_num_in_card(int card, int *count) {
    *count = card == 7 ? 2 : 1;
    return 0;
}

#if NUMBERS
/* The driver counts backwards: 7.1 is chip 0, 7.0 is chip 1, 3.0 is chip 2. */
int dcmi_get_device_logic_id(int *number, int card, int device) {
    *number = card == 3 ? 2 : 1 - device;
    return 0;
}
#endif

/* In tenths of watts, by the place. */
int dcmi_get_device_power_info(int card, int device, int *power) {
    *power = 1000 * card + 3000 * device + 5;
    return codes[POWER];
}

#ifdef SECOND
int dcmiv2_init(void) { return codes[SECOND_INIT]; }
int dcmiv2_get_device_power_info(int number, int *power) {
    *power = 2000 + 1000 * number;
    return number < 3 ? 0 : -8007;
}
#endif
